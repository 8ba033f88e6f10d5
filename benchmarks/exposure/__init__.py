"""Who meets features that leak, in ordinary traffic: wrong requests, by requests in flight."""
