"""A real Orthanc with DICOMweb for tests: add images over HTTP, query it over DIMSE and DICOMweb, stop it."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
from pydicom import Dataset

from tests.support.dicom.pacs import save, wait_for
from tests.support.ports import free_port

PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


class Orthanc:
    """An Orthanc with the node `aet` at `port` as a modality; `more` are further settings. A context manager."""

    def __init__(self, folder: Path, aet: str = "CXRLOOP", port: int = 11112, **more: object) -> None:
        self.http, self.port = free_port(), free_port()
        self.url, self.web = f"http://127.0.0.1:{self.http}", f"http://127.0.0.1:{self.http}/dicom-web"
        self.peer = f"ORTHANC@127.0.0.1:{self.port}"
        folder.mkdir(exist_ok=True)
        self._folder = folder
        settings = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "HttpPort": self.http,
            "DicomPort": self.port,
            "DicomAet": "ORTHANC",
            "DicomModalities": {"node": [aet, "127.0.0.1", port]},
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "AuthenticationEnabled": False,
            "RemoteAccessAllowed": False,
            "Plugins": [PLUGIN],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings | more))
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Orthanc":
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([program, str(self._folder / "orthanc.json")], stdout=log, stderr=log)
        assert wait_for(self._up, 20), (self._folder / "log").read_text()[-2000:]
        return self

    def _up(self) -> bool:
        try:
            return httpx.get(self.url + "/system", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)  # a normal stop takes seconds, and its data are not needed

    def add(self, *images: Dataset) -> None:
        """Add images."""
        for image in images:
            path = save(image, self._folder / "image.dcm")
            httpx.post(self.url + "/instances", content=path.read_bytes(), timeout=30).raise_for_status()
            path.unlink()

    def remove(self, image: Dataset) -> None:
        """Delete an image."""
        (match,) = httpx.post(self.url + "/tools/lookup", content=str(image.SOPInstanceUID), timeout=30).json()
        httpx.delete(f"{self.url}/instances/{match['ID']}", timeout=30).raise_for_status()
