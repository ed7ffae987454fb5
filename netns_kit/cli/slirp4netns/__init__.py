"""`netns-kit slirp4netns`: a drop-in for slirp4netns, in one process."""
