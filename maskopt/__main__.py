"""Entry point of `python -m maskopt`, and so of `torchrun … -m maskopt`."""

from maskopt.cli import main

if __name__ == "__main__":
    main()
