"""One file per operation: checks, registered operators with fakes, the autograd.Function."""
