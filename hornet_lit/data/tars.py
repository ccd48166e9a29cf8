"""Members of tar files, read without trusting what their headers say about sizes."""

from __future__ import annotations

import tarfile

MAX_HEADER = 2**20  # bytes of a long name or of other things said about a member
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class PlainTarInfo(tarfile.TarInfo):
    """For tarfile.open(tarinfo=…): extended headers are read into memory whole, and in a compressed file of a few
    megabytes one can have gigabytes."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]
