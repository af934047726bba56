"""The patcher's engine: scan a model, convert its linears, fuse what its family allows, report."""
