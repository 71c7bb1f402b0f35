"""A pytest plugin: every association of pynetdicom, asking or answering, reads through dicom.node.pdu_reader.

Loaded by tests/dicom/node/test_pdu_reader.py into a process of its own, in which pynetdicom's own tests run.
"""

from pynetdicom.association import Association

from dicom.node.pdu_reader import Stream

plain = Association.__init__


def streaming(self: Association, *arguments: object, **named: object) -> None:
    plain(self, *arguments, **named)  # type: ignore[arg-type]
    Stream(self, None).install()


Association.__init__ = streaming  # type: ignore[method-assign]
