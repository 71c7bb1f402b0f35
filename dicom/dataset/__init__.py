"""DICOM files and data sets: Part 10 envelope, elements, header values, transfer syntaxes, facts of an image.

Must not import another room of dicom.
"""
