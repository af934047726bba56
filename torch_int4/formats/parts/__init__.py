"""Parts that the formats of checkpoints share: files, checks, orders of codes."""
