"""How fast training and sampling are, against others and against the machine.

See README.md in this folder.
"""
