"""The whole job on a small real model: what `maskopt demo` runs."""
