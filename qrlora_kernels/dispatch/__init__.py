"""Who computes what: problems, the rules and measurements that choose, and the one chooser."""
