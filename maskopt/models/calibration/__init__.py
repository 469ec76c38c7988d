"""From text and conversations to windows of tokens."""
