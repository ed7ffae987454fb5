"""`TapDevice`: the descriptor of frames, and a bad link in front of it."""
