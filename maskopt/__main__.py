"""`python -m maskopt`, and so `torchrun … -m maskopt`."""

from maskopt.cli import main

if __name__ == "__main__":
    main()
