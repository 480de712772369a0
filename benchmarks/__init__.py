"""How fast training and sampling are, against others and against the machine; see README.md in this
folder.
"""
