"""The tables of the conformance statement, compared with the code."""

import importlib
import re
import ssl
from pathlib import Path

import pytest
from pydicom.uid import UID

from agent.site.config import Config
from dicom.dataset import store_status
from dicom.dataset.facts import SOP_CLASSES, STORAGE_COMMITMENT, VERIFICATION
from dicom.dataset.part10 import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from dicom.dataset.syntaxes import SYNTAXES
from dicom.node import commitment, tls

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "conformance.md").read_text("utf-8")


def table(head: str) -> list[list[str]]:
    """Return the rows of the tables with this header, as cells."""
    rows = []
    for block in re.findall(rf"^\| {re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M):
        rows += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
    assert rows, head
    return rows


def section(title: str, text: str = PAGE) -> str:
    """Return the text from this heading or bold word to the next one."""
    return re.split(r"\n#|\n\*\*", text.split(title, 1)[1])[0]


def codes(text: str) -> set[int]:
    return {int(code, 16) for code in re.findall(r"^\| (0x[0-9A-F]{4}) \|", text, re.M)}


def test_the_sop_classes_are_those_of_the_node():
    rows = table("SOP class | UID")
    assert {row[1] for row in rows if row[3] == "yes"} == {VERIFICATION, STORAGE_COMMITMENT, *SOP_CLASSES}
    assert all(row[0] in (UID(row[1]).name, UID(row[1]).name.removesuffix(" SOP Class")) for row in rows)


def test_the_transfer_syntaxes_are_those_of_the_node_in_its_order():
    rows = table("transfer syntax | UID")
    assert [row[1] for row in rows] == list(SYNTAXES)
    assert [row[0] for row in rows] == [UID(syntax).name for syntax in SYNTAXES]


@pytest.mark.parametrize("row", table("limit | value"), ids=lambda row: row[2].strip("` "))
def test_each_limit_has_the_value_of_the_code(row):
    value, where = int(row[1]), row[2].strip("` ")
    if where.startswith("dicom."):
        module = ".".join(
            part for part in where.split(".") if part.islower() and part not in ("artim", "idle", "stall")
        )
        limit = importlib.import_module(module)
        for name in where.removeprefix(module + ".").split("."):
            limit = getattr(limit, name)
    else:
        section_name, key = where.split(".")
        limit = getattr(getattr(Config(), section_name), key)
    assert limit == value


def test_the_table_of_c_store_has_every_status():
    statuses = {value for name, value in vars(store_status).items() if name.isupper() and isinstance(value, int)}
    assert codes(section("**Storage (C-STORE).**")) == statuses - {store_status.UNDEFINED}


def test_the_tables_of_storage_commitment_have_every_status_and_reason():
    statuses = codes(section("**Storage commitment (N-ACTION).**"))
    reasons = codes(section("#### 4.2.2"))
    assert reasons == {commitment.PROCESSING_FAILURE, commitment.NO_SUCH_INSTANCE, commitment.CLASS_CONFLICT}
    assert statuses == {
        commitment.SUCCESS,
        commitment.NO_SUCH_INSTANCE,
        commitment.INVALID_ARGUMENT,
        commitment.NO_SUCH_ACTION,
        commitment.NOT_AUTHORISED,
        commitment.RESOURCE_LIMITATION,
    }


def test_a_report_is_repeated_at_the_intervals_of_the_code():
    *first, last = commitment.BACKOFF_S
    sentence = f"repeated after {', '.join(map(str, first))} and then every {last} seconds"
    assert sentence in PAGE and f"dropped after {commitment.KEPT_S // 3600} hours" in PAGE


def test_the_cipher_suites_are_those_of_the_port():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(tls.CIPHERS)
    offered = [cipher["name"] for cipher in context.get_ciphers()]
    assert re.findall(r"`((?:TLS_|ECDHE-)[A-Z0-9_-]+)`", PAGE) == offered


def test_the_implementation_uid_and_name_are_those_of_the_node():
    assert f"`{IMPLEMENTATION_UID}`, version name `{IMPLEMENTATION_NAME}`" in PAGE


def test_every_setting_that_the_page_names_exists():
    for name in set(re.findall(r"`(node|retention|results|admission)\.([a-z_]+)`", PAGE)):
        assert name[1] in type(getattr(Config(), name[0])).model_fields, name
