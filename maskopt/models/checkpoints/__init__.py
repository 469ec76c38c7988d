"""Model folders: tensors, masks, manifest and journal, read without trusting them and written whole."""
