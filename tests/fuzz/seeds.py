"""Well-formed input for each target, from which fuzzing starts; made anew, not kept."""

import gzip
import json
import tarfile

import msgspec
import zstandard

from lazyfs.checkpoint.trace import dump_trace
from lazyfs.layers.deflate import best_engine
from lazyfs.layers.gzip import GzipDecoder
from tests.checkpoint import sample
from tests.checkpoint.test_criu_phases import LOG as CRIU_LOG
from tests.checkpoint.test_trace import SMALL
from tests.fuzz.targets import FILES, decode
from tests.images import tar_bytes, zstd_chunked
from tests.layers.indexed import DATA
from tests.layers.stargz_writer import estargz, stargz_zstd
from tests.layers.ztoc_writer import Point, checkpoints

_KINDS = ("inventory", "pstree", "core-", "ids-", "mountpoints-", "pagemap-", "mm-", "cpuinfo")
"""In the order of `targets.criu_images`."""


def seeds() -> dict[str, list[bytes]]:
    """Return some bytes for each target that need them."""
    tars = [tar_bytes(FILES, kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    stream = gzip.compress(tars[0], 6, mtime=0)
    packed = zstandard.ZstdCompressor().compress(tars[0])
    manifest = json.dumps(sample.manifest()).encode()
    decoder = GzipDecoder(best_engine())
    decode(decoder, stream)
    index = decoder.restart_index() or b""
    images = sample.files()
    ztoc = (DATA / "soci/ztoc").read_bytes()
    tocs: list[dict[str, object]] = []
    zstd_chunked(FILES, edit=tocs.append)
    estargz(FILES, chunk_bytes=4096, edit=tocs.append)
    stargz_zstd(FILES, chunk_bytes=4096, edit=tocs.append)
    texts = [json.dumps(toc).encode() for toc in tocs]
    found: dict[str, list[bytes]] = {
        "reference": [
            b"quay.io/team/a:1",
            b"oci:/dir:tag",
            b"localhost:5000/a@sha256:" + b"1" * 64,
        ],
        "image_manifest": [b"\0" + manifest],
        "tar": tars,
        "tar_stream": tars,
        "zstd_chunked_toc": texts[:1],
        "estargz_toc": texts[1:2],
        "stargz_zstd_toc": texts[2:],
        "layer": [
            b"\0" + tars[0],
            b"\1" + stream,
            b"\2" + packed,
            b"\2" + zstd_chunked(FILES).blob,
        ],
        "gzip_stream": [stream, stream + stream],
        "zstd_stream": [packed, packed + packed],
        "ztoc": [ztoc],
        "soci_checkpoints": [checkpoints([Point(10, 0), Point(900, 5000, 3, b"window")])],
        "restart_index": [len(stream).to_bytes(4, "little") + index],
        "criu_images": [
            bytes([kind]) + data
            for path, data in images.items()
            for kind, name in enumerate(_KINDS)
            if path.rpartition("/")[2].startswith(name)
        ],
        "dumps": [
            b"d" + data for path, data in images.items() if path.endswith((".dump", ".json"))
        ],
        "archive": tars,
        "stub": [
            b'{"version":1,"reference":"a.example/b@sha256:' + b"0" * 64 + b'","pages":'
            b'[{"name":"pages-1.img","size_bytes":1}],"lazy_pages":true}',
            b'{"rootfs":{"type":"layers","diff_ids":["sha256:0"]},"history":[]}',
        ],
        "trace_document": [b"p" + dump_trace(SMALL), msgspec.json.encode(SMALL)],
        "criu_log": [CRIU_LOG.encode()],
        "headers": [
            b"bytes 0-9/100",
            b"120",
            b"Sun, 22 Nov 2026 10:00:00 GMT",
            b'Bearer realm="https://auth.example/token",service="r",scope="a:b:pull"',
            b'</v2/a/referrers/x?n=1>; rel="next"',
            b"https://other.example/blob?signature=1",
        ],
        "token": [b'{"token":"abc","expires_in":60}', b'{"access_token":"abc"}'],
        "auth_file": [
            b'{"auths":{"r.example/team":{"auth":"dTpw","identitytoken":"x"}},"credsStore":"a"}',
            b'{"auths":{"https://r.example/v1/":{"username":"u","password":"p"}}}',
            b'{"r.example":{"registrytoken":"x"}}',
            b'{"credHelpers":{"r.example":"a"},"Username":"<token>","Secret":"x"}',
        ],
        "proxy": [
            b"http://user:password@proxy:3128\nr.example,.a.b,*.c:443,10.0.0.0/8,[fd00::1]:80",
            b"socks5://p\n*",
            b"::ffff:127.0.0.1",
            b"0x7f.1",
        ],
        "mirror_entries": [
            b"[[registry]]\nprefix='*.example'\nlocation='m.example/x'\ninsecure=true\n"
            b"[[registry.mirror]]\nlocation='c.example:5000'\npull-from-mirror='tag-only'\n",
            b"[[registry]]\nlocation='r.example'\nblocked=true\nmirror-by-digest-only=true\n",
            b"[registries.search]\nregistries=['docker.io']\n",
        ],
        "host_servers": [
            b"server='https://r.example'\n[host.'http://m:80/a/../b']\ncapabilities=['pull']\n"
            b"dial_timeout='1.5s'\noverride_path=true\nca=['a','/b']\nclient=[['c','k'],'d']\n"
            b"[host.'http://m:80/a/../b'.header]\nX-A=['secret','b']\n",
            b"skip_verify=true\n[host.'[::1]:5000']\n",
        ],
        "referrers_list": [(DATA / "soci/referrers.json").read_bytes(), manifest],
    }
    return found
