"""A mask as a picture that can be looked at closely, without a script."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from maskopt.errors import OptionError

#: rows and inputs that are shown at most: a picture of all of a large layer would be megabytes
MOST = 1024


@dataclass(frozen=True)
class MaskPicture:
    """Dark where a weight is kept, light where it is pruned; rows are outputs.

    Attributes:
        kept: bool [rows, n].
    """

    name: str
    kept: Bool[Tensor, "rows n"]

    def png(self) -> bytes:
        """One bit a weight, of the first MOST rows and inputs."""
        try:
            from PIL import Image
        except ImportError:
            raise OptionError(
                'the picture of a mask needs Pillow: pip install "maskopt[report]"'
            ) from None
        part = self._shown().numpy()
        data = io.BytesIO()
        Image.fromarray(np.where(part, 0, 255).astype(np.uint8)).convert("1").save(data, "png")
        return data.getvalue()

    def html(self) -> str:
        part = self._shown()
        rows, n = part.shape
        of = "" if part.shape == self.kept.shape else (
            f" of {self.kept.shape[0]} × {self.kept.shape[1]}, the upper left part"
        )  # fmt: skip
        words = (
            f"Mask of {self.name}: {rows} outputs (down) by {n} inputs (across){of}; dark is kept, "
            f"{float((~part).float().mean()):.1%} is pruned"
        )
        data = base64.b64encode(self.png()).decode()
        zooms = "".join(
            f'<input type="radio" name="zoom" id="zoom{i}"{" checked" * (i == 0)}>'
            f'<label for="zoom{i}">{label}</label>'
            for i, label in enumerate(("whole", "1 : 1", "4 : 1"))
        )
        return (
            f'<h2>A mask</h2>\n<figure><div class=zoom style="--four: {4 * n}px">{zooms}'
            f'<div class="pane" tabindex="0"><img src="data:image/png;base64,{data}" '
            f'alt="{html.escape(words, quote=True)}"></div></div>'
            f"<figcaption>{html.escape(words)}.</figcaption></figure>"
        )

    def _shown(self) -> Tensor:
        return self.kept[:MOST, :MOST]
