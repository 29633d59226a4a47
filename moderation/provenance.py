"""Marks that say: an AI model made this picture.

IPTC's digital source type in XMP (Iptc4xmpExt 2023.1), which every common viewer and the EU's code
of practice on transparency read. It is plain metadata and can be stripped.
"""

from __future__ import annotations

TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


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
