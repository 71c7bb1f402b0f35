"""Durable files: the inbox, the content-addressed store, the drop folder.

Must import only dicom.dataset and cxrloop.
"""
