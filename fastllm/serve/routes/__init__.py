"""The routes, one file per API. Each reads its body, starts a generation, and gives it its API's shape."""
