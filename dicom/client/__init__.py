"""Client of other DICOM systems: query and retrieve over DIMSE and DICOMweb, sending of objects.

Must import only dicom.dataset, dicom.store and dicom.errors.
"""
