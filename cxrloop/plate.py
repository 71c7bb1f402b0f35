"""The plate: the array that the pixel path makes of one image.

A plate is uint8 [512, 512], MONOCHROME2 (0 is black), letterboxed, stored as .npy.
"""

PLATE_SIDE = 512  # pixels
PLATE_SHAPE = (PLATE_SIDE, PLATE_SIDE)
PLATE_VERSION = 1  # stored with every plate and bundle; every change of the pixel path raises it
