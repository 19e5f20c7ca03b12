"""Examples as one HTML file: what the model sees, what it learns, who sees whom.

page       the file as a whole; `page.html.jinja` and `page.css` are its form
tokens     tokens as readable cells, with targets, positions and weights
pictures   images and frames with what the answers point at
mask       the attention mask as a small picture
"""
