"""The published formats, against their own examples: DSSE's encoding, RFC 6962's trees, Ed25519 keys
as PEM, OpenSSF's manifest."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditgap.errors import UsageError
from auditgap.evidence import dsse, keys, manifest, merkle

#: The inputs and roots of the certificate transparency project's reference tests.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def test_what_is_signed_is_encoded_as_dsse_says():
    said = dsse.pae("http://example.com/HelloWorld", b"hello world")
    assert said == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("ß", b"\x00 1") == b"DSSEv1 2 \xc3\x9f 3 \x00 1"


def test_roots_are_those_of_rfc_6962():
    hashes = [merkle.leaf(data) for data in LEAVES]
    assert [merkle.root(hashes[:n]).hex() for n in range(1, 9)] == list(ROOTS)
    assert merkle.root([]) == hashlib.sha256().digest()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_a_proof_holds_for_its_leaf_and_place_alone(n):
    hashes = [merkle.leaf(bytes([i])) for i in range(n)]
    root = merkle.root(hashes)
    for i in range(n):
        path = merkle.proof(hashes, i)
        assert merkle.root_through(hashes[i], i, n, path) == root
        assert merkle.root_through(merkle.leaf(b"other"), i, n, path) != root
        for at in range(len(path)):
            other = [*path[:at], bytes(32), *path[at + 1 :]]
            assert merkle.root_through(hashes[i], i, n, other) != root
        with pytest.raises(ValueError, match="no such place"):
            merkle.root_through(hashes[i], i, n, [*path, bytes(32)])
    # two nodes beside each other pass for no leaf
    if n > 1:
        pair = merkle.proof(hashes, 0)[0]
        assert merkle.leaf(hashes[0] + pair) != merkle.root(hashes[:2])


def test_a_statement_in_its_envelope():
    key = Ed25519PrivateKey.generate()
    said = dsse.statement([{"name": "m", "digest": {"sha256": "00"}}], "urn:x", {"n": 3})
    envelope = dsse.sign(said, key)
    written = envelope.to_json()
    assert set(written) == {"payload", "payloadType", "signatures"}
    assert written["payloadType"] == "application/vnd.in-toto+json"
    payload = json.loads(base64.b64decode(written["payload"]))
    assert payload["_type"] == "https://in-toto.io/Statement/v1" and payload == said
    again = dsse.from_json(json.loads(json.dumps(written)), "here")
    assert again.signed_by(key.public_key()) and again.statement == said
    assert not again.signed_by(Ed25519PrivateKey.generate().public_key())
    (name, signature) = written["signatures"][0].values()
    assert name == keys.id_of(key.public_key()) and len(base64.b64decode(signature)) == 64


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"payload": "!", "payloadType": "x", "signatures": []}, {"payload": 3}],
    ids=str,
)
def test_what_is_no_envelope_is_a_sentence(value):
    with pytest.raises(UsageError, match="no DSSE envelope"):
        dsse.from_json(value, "here.json")


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path):
    path = tmp_path / "keys" / "auditor.pem"
    public = keys.make(path)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes().startswith(b"-----BEGIN")
    assert keys.id_of(keys.private(path).public_key()) == keys.id_of(keys.read(public))
    with pytest.raises(UsageError, match="never replaced"):
        keys.make(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        keys.private(path)
    for read, wrong in ((keys.private, public), (keys.read, path)):
        wrong.chmod(0o600)
        with pytest.raises(UsageError, match="Ed25519"):
            read(wrong)


def test_the_manifest_of_a_model(tmp_path):
    for name, text in {
        "model.safetensors": "weights",
        "templates/a.jinja": "a",
        "templates-b": "b",
        ".git/config": "not of the model",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = manifest.of(tmp_path)
    # in the order of paths, part by part
    assert [one["name"] for one in found["resources"]] == [
        "model.safetensors",
        "templates/a.jinja",
        "templates-b",
    ]
    digests = [hashlib.sha256(text).digest() for text in (b"weights", b"a", b"b")]
    assert manifest.root(found) == hashlib.sha256(b"".join(digests)).hexdigest()
    (tmp_path / "templates-b").write_text("c")
    (tmp_path / "new.json").write_text("{}")
    names = [name for name, _, _ in manifest.differences(found, manifest.of(tmp_path))]
    assert names == ["new.json", "templates-b"]
