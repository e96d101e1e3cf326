"""The structs of everything that travels: requests, replies, and the snapshot of a run."""
