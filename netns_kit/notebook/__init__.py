"""Magics and live views for IPython and Jupyter: `%load_ext netns_kit` (docs/notebook.md).

It takes the extra `notebook`.  How objects are shown is `netns_kit.display`, which takes nothing.
"""
