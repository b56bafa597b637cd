"""One module per suite; each turns a case into rows."""
