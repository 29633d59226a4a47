"""Marks that say that an AI model made an image, in three layers.

* IPTC's digital source type in XMP (Iptc4xmpExt 2023.1): plain metadata, read by every common
  viewer, easily stripped.
* Content Credentials: signed, so a change is noticed; stripped as easily.
* The watermark: in the pixels, so it is there when the metadata is gone; read by this installation.

`Marks` writes them and `check` reads them. The same image gets the same watermark and the same XMP;
Content Credentials differ in random salts, so the bytes of two files differ while their pixels do
not.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import ProvenanceError
from calotype.moderation.images.decode import decode_image
from calotype.moderation.provenance import content_credentials, watermark
from calotype.moderation.provenance.content_credentials import Credentials
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.moderation.provenance.signer import Signer

Layer = Literal["xmp", "watermark", "c2pa"]
LAYERS: tuple[Layer, ...] = ("xmp", "watermark", "c2pa")
Pixels = NDArray[np.uint8]
log = logging.getLogger(__name__)

TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SOURCE_TYPE = re.compile(
    rb"DigitalSourceType[^A-Za-z]{1,8}?[^<\"']{0,200}?/digitalsourcetype/([A-Za-z]{1,80})"
)


def digital_source_xmp(source_type: str = TRAINED_ALGORITHMIC_MEDIA) -> bytes:
    """An XMP packet with the digital source type; the same bytes every time."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="calotype" '
        f'Iptc4xmpExt:DigitalSourceType="{source_type}"/>'
        "</rdf:RDF></x:xmpmeta>"
        '<?xpacket end="w"?>'
    ).encode()


class Marks:
    """What this installation writes into every image.

    Args:
        keys: its secrets; None for layers that need none.
        layers: what is written.
        required: whether a missing library is an error; otherwise Content Credentials are left out
            and a warning is logged once.
    """

    def __init__(
        self,
        keys: InstallationKeys | None,
        layers: tuple[Layer, ...] = LAYERS,
        *,
        required: bool = False,
    ) -> None:
        if keys is None and set(layers) - {"xmp"}:
            raise ProvenanceError("Watermark and Content Credentials need keys.")
        self._keys, self._layers = keys, layers
        if "c2pa" in layers and not required and not content_credentials.available():
            log.warning("pictures get no Content Credentials: install calotype[provenance]")
            self._layers = tuple(layer for layer in layers if layer != "c2pa")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._layers

    @cached_property
    def _signer(self) -> Signer:
        assert self._keys is not None
        return self._keys.signer()

    def xmp(self) -> bytes | None:
        """The packet to write into the file; None if that layer is off."""
        return digital_source_xmp() if "xmp" in self._layers else None

    def in_pixels(self, pixels: Pixels, *, strong: bool = False) -> tuple[Pixels, str | None]:
        """The image with the watermark, and its payload; None where there is no room for one.

        Args:
            strong: the file will be saved at a quality that somebody chose, perhaps a low one.
        """
        if "watermark" not in self._layers or self._keys is None:
            return pixels, None
        payload = watermark.payload_of(pixels, self._keys.watermark)
        marked = watermark.embed(pixels, self._keys.watermark, payload, strong=strong)
        return marked, None if marked is pixels else payload.hex()

    def signed(self, data: bytes, kind: str, payload: str | None) -> bytes:
        """The finished file with Content Credentials; nothing may be written into it afterwards.

        Raises:
            ProvenanceError: the signer cannot sign.
        """
        if "c2pa" not in self._layers:
            return data
        return content_credentials.sign(
            data,
            kind,
            self._signer,
            source_type=TRAINED_ALGORITHMIC_MEDIA,
            generator=("calotype", _version()),
            watermark=payload,
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the marks of a file say."""

    kind: str
    """``png``, ``jpeg`` or ``webp``; another format as Pillow calls it."""
    width: int
    height: int
    source_type: str | None
    """Of the XMP: the end of its address, ``trainedAlgorithmicMedia``."""
    credentials: Credentials | None
    credentials_read: bool
    """False where the library is missing, or no Content Credentials are read from this format."""
    watermark: watermark.Found | None
    watermark_read: bool
    """False where there is no key to look with."""
    former_key: bool
    """Whether the watermark was made with a key that is no longer used."""

    @property
    def ours(self) -> bool:
        """Whether this installation made it, beyond what anybody could write into a file."""
        return self.watermark is not None or (
            self.credentials is not None and self.credentials.trusted
        )

    def to_json(self) -> JsonObject:
        return {**asdict(self), "ours": self.ours}


def check(data: bytes, keys: InstallationKeys | None, name: str = "the picture") -> Provenance:
    """What the marks of an image file say.

    Args:
        keys: of the installation that asks; None if it has none.

    Raises:
        ImageError: it is no image that can be read.
        ProvenanceError: the signer of this installation cannot be read.
    """
    pixels = decode_image(data, name)[0]
    with Image.open(io.BytesIO(data)) as image:
        kind = (image.format or "").lower()
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    credentials, credentials_read = None, False
    if kind in content_credentials.MIME_TYPES and content_credentials.available():
        credentials_read = True
        credentials = content_credentials.read(data, kind, keys.signer().anchor if keys else "")
    found, former = None, False
    for number, key in enumerate((keys.watermark, *keys.former) if keys else ()):
        found = watermark.detect(pixels, key)
        if found is not None:
            former = number > 0
            break
    return Provenance(
        kind,
        pixels.shape[1],
        pixels.shape[0],
        _source_type(packet if isinstance(packet, bytes) else packet.encode()),
        credentials,
        credentials_read,
        found,
        keys is not None,
        former,
    )


def _source_type(packet: bytes) -> str | None:
    """The digital source type in an XMP packet, as attribute or as element."""
    found = _SOURCE_TYPE.search(packet)
    return found[1].decode("ascii") if found else None


def _version() -> str:
    return importlib.metadata.version("calotype")
