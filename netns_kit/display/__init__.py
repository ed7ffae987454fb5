"""How objects are shown: as text in a terminal, and as HTML and SVG in a notebook.

An object that is shown is `Displayed`, and says by a `View` what there is to see.  A view is plain data and knows
both forms: neither needs another package, a script or a style sheet from elsewhere.

What an object has to show stands in the module `display` of its own folder, which is imported when somebody looks.

Text comes from programs inside, and is hostile: `text.visible` leaves no character that moves a cursor or turns the
direction of writing, and whatever becomes part of HTML or SVG is escaped where that is made, in `view` and `svg`.
"""
