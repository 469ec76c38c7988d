"""Text that every Python already has: the help topics of `pydoc_data.topics`, about 110k tokens."""

from __future__ import annotations

from dataclasses import dataclass

from maskopt.errors import DataError

#: share of the characters that goes to calibration
CALIBRATION_SHARE = 0.75


@dataclass(frozen=True)
class DemoText:
    """`calibration` and `evaluation`: lists of documents, disjoint."""

    calibration: list[str]
    evaluation: list[str]


def demo_text() -> DemoText:
    """The topics in the order of their names, each text once, cut between two topics at three quarters."""
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data.topics; name a text file instead"
        ) from None
    documents = list(dict.fromkeys(topics[name].strip() for name in sorted(topics)))
    documents = [document for document in documents if document]
    total, seen, cut = sum(map(len, documents)), 0, 0
    while seen < CALIBRATION_SHARE * total:
        seen += len(documents[cut])
        cut += 1
    return DemoText(documents[:cut], documents[cut:])
