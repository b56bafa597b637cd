"""One file per operation: checks, the registered operators with their fakes, the autograd.Function."""
