"""A pytest plugin: every association of pynetdicom, requestor or acceptor, reads through dicom.node.pdu_reader.

tests/dicom/node/test_pdu_reader.py loads it into a separate process, which runs pynetdicom's own tests.
"""

from pynetdicom.association import Association

from dicom.node.pdu_reader import PduReader

original_init = Association.__init__


def init_with_pdu_reader(self: Association, *arguments: object, **named: object) -> None:
    original_init(self, *arguments, **named)  # type: ignore[arg-type]
    PduReader(self, None).install()


Association.__init__ = init_with_pdu_reader  # type: ignore[method-assign]
