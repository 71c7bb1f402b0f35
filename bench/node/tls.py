"""The cost of TLS: the same images and echoes in the clear, over TLS and over mutual TLS, in interleaved rounds.

Each way has its own node in its own process; every round uses every way, in changing order. Figures are medians over
rounds; ratios are of pairs within a round. Other load on the machine disturbs the receiver's CPU time least. Images:
RG1 of pydicom-data, uncompressed, 7.2 MB, with new UIDs.

    python bench/node/tls.py [--rounds 7] [--images 6] [--echoes 10] [--out bench/results/tls.json]
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results
from bench.common.appliance import ROOT, python_path
from dicom.client.sender import echo, send
from dicom.node import tls
from dicom.node.tls import Identity
from tests.support.dicom.certificates import authority

NODE = """
import resource, sys
from pathlib import Path
from dicom.node import tls
from dicom.store.inbox import Inbox
from dicom.node.listener import Listener, Node
folder, *paths = sys.argv[1:]
identity = tls.Identity(*map(Path, paths)) if paths else None
inbox = Inbox(Path(folder), 0)
listener = Listener(Node(port=0, context=tls.server_context(identity) if identity else None), inbox)
listener.start()
print(listener.port, flush=True)
for line in sys.stdin:
    for path in inbox.waiting():
        path.unlink()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, flush=True)
"""


class Way:
    """One node and the TLS context to reach it; `identity` None: in the clear."""

    def __init__(self, name: str, folder: Path, identity: Identity | None):
        self.name, paths = name, [identity.cert, identity.key, identity.ca] if identity else []
        command = [sys.executable, "-c", NODE, str(folder / name), *(str(path) for path in paths if path)]
        self.node = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_path(), cwd=ROOT
        )
        self.port = int(self._line())
        self.context = tls.own_node_context(identity) if identity else None

    def _line(self) -> str:
        assert self.node.stdout
        return self.node.stdout.readline()

    def cpu(self) -> float:
        """Empty the node's inbox; return the CPU seconds that the node has used so far."""
        assert self.node.stdin
        self.node.stdin.write("\n")
        self.node.stdin.flush()
        return float(self._line())

    def round(self, images: list[Path], echoes: int) -> dict[str, float]:
        """Send echoes, each on its own connection, then the images on one association; return the figures."""
        where = ("127.0.0.1", self.port, "CXRLOOP")
        seconds_of_echoes = []
        for _ in range(echoes):
            began = time.perf_counter()
            assert echo(*where, tls=self.context)
            seconds_of_echoes.append(time.perf_counter() - began)
        size = sum(image.stat().st_size for image in images) / 1e6
        before, began = self.cpu(), time.perf_counter()
        assert all(status == 0 for _, status in send(images, *where, tls=self.context))
        seconds = time.perf_counter() - began
        return {
            "echo_ms": median(seconds_of_echoes) * 1e3,
            "MB/s": size / seconds,
            "node_cpu_ms/MB": (self.cpu() - before) / size * 1e3,
        }


def images(folder: Path, count: int) -> list[Path]:
    """Write `count` copies of the radiograph with new UIDs; return their paths."""
    paths = []
    for n in range(count):
        ds = dcmread(get_testdata_file("RG1_UNCR.dcm", download=False))
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.save_as(folder / f"{n}.dcm")
        paths.append(folder / f"{n}.dcm")
    return paths


def main() -> None:
    """Measure the three ways in every round, print and write."""
    parser = results.parser(__doc__, "tls.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--echoes", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hospital, sent = authority(folder), images(folder, options.images)
        ways = [
            Way("in the clear", folder, None),
            Way("TLS", folder, hospital.issue("one")),
            Way("mutual TLS", folder, hospital.issue("two", ca=hospital.pem)),
        ]
        rounds: list[dict[str, dict[str, float]]] = []
        try:
            for n in range(options.rounds):
                order = random.Random(n).sample(ways, len(ways))
                rounds.append({way.name: way.round(sent, options.echoes) for way in order})
        finally:
            for way in ways:
                way.node.terminate()
    keys, plain = list(rounds[0]["TLS"]), ways[0].name
    table = {
        way.name: {key: median(round_[way.name][key] for round_ in rounds) for key in keys}
        | {f"{key}, of plain": median(round_[way.name][key] / round_[plain][key] for round_ in rounds) for key in keys}
        for way in ways
    }
    print("| | " + " | ".join(table[plain]) + " |\n|---" + "|---" * len(table[plain]) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    results.write(options.out, {"machine": machine.facts(), "table": table, "rounds": rounds})


if __name__ == "__main__":
    main()
