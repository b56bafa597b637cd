"""Many adapters over one MiniLM-L6: served, trained, and the gradient of each example."""
