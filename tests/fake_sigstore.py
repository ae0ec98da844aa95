"""A Sigstore of one's own on loopback: an identity provider, a certificate authority (Fulcio) and a log (Rekor).

It speaks the HTTP interfaces that the real client uses and signs everything with keys made on the spot, so that the
real client signs and verifies against it by the file ``trust``. Certificates, timestamps of the certificate log, the
inclusion proof (a log of one entry) and the entry's own timestamp are as the formats want them; nothing is stored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ISSUER = "https://token.actions.githubusercontent.com"
WORKFLOW = "ibm/bot/.github/workflows/iterate.yml@refs/heads/main"
IDENTITY = f"https://github.com/{WORKFLOW}"
REQUEST_TOKEN = "canary-request-token"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def jwt(**claims: Any) -> str:
    """A token that nobody signed: the client only passes it on."""
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "typ": "JWT"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"canary-signature"))


class Sigstore:
    """The services, while the context lasts; ``refusal`` is the status that the authority answers with, 0 for none."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("model_signing.signing", reason="the extra sign")
        from cryptography.hazmat.primitives.asymmetric import ec

        self.root_key, self.ct_key, self.log_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.folder, self.refusal, self.requests = folder, 0, list[str]()
        self.root = self.make_root()
        now = int(datetime.now(UTC).timestamp())
        times = {"iat": now - 5, "nbf": now - 5, "exp": now + 300}
        self.token = jwt(aud="sigstore", iss=ISSUER, sub="repo:ibm/bot", job_workflow_ref=WORKFLOW, **times)

    def __enter__(self) -> Sigstore:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trust = self.folder / "trust.json"
        self.trust.write_text(json.dumps(self.describe()))
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def be_actions(self, patch: pytest.MonkeyPatch) -> None:
        """The environment of a job with ``id-token: write``."""
        patch.setenv("GITHUB_ACTIONS", "true")
        patch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{self.url}/token?run=1")
        patch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", REQUEST_TOKEN)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ours.requests.append(self.path)
                if self.path.startswith("/token?"):
                    vouched = self.headers["Authorization"] == f"bearer {REQUEST_TOKEN}" and "sigstore" in self.path
                    self.answer({"value": ours.token} if vouched else {}, 200 if vouched else 403)
                else:
                    self.answer({"authorization_endpoint": f"{ours.url}/auth", "token_endpoint": f"{ours.url}/auth"})

            def do_POST(self) -> None:
                ours.requests.append(self.path)
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/signingCert"):
                    said = self.headers["Authorization"]
                    if ours.refusal:  # a server may repeat what it was sent
                        self.answer({"message": f"no certificate for {said}"}, ours.refusal)
                    else:
                        self.answer(ours.certify(asked, said.removeprefix("Bearer ")))
                else:
                    self.answer(ours.enter(asked), 201)

            def answer(self, body: Any, status: int = 200) -> None:
                text = json.dumps(body).encode()
                self.send_response(status, str(body) if status >= 400 else None)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    # -- the authority --------------------------------------------------------------------------------------------

    def make_root(self) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sigstore here")])
        key, now = self.root_key.public_key(), datetime.now(UTC)
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key)
        made = made.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made = made.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        return made.sign(self.root_key, hashes.SHA256())

    def certify(self, asked: Any, token: str) -> Any:
        """A certificate of ten minutes for the workflow in ``token``, with the certificate log's timestamp in it."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.serialization import Encoding

        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        request = x509.load_pem_x509_csr(base64.b64decode(asked["certificateSigningRequest"]))
        now, ours = datetime.now(UTC), x509.SubjectKeyIdentifier.from_public_key(self.root_key.public_key())
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
             "crl_sign", "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        who = x509.UniformResourceIdentifier(f"https://github.com/{claims['job_workflow_ref']}")
        issuer = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
        made = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(self.root.subject)
        made = made.public_key(request.public_key()).serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(seconds=5)).not_valid_after(now + timedelta(minutes=10))
        made = made.add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        made = made.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key()), critical=False)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours), critical=False)
        made = made.add_extension(x509.SubjectAlternativeName([who]), critical=True)
        made = made.add_extension(x509.UnrecognizedExtension(issuer, claims["iss"].encode()), critical=False)
        seen = self.timestamp(made.sign(self.root_key, hashes.SHA256()).tbs_certificate_bytes)
        listed = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
        made = made.add_extension(x509.UnrecognizedExtension(listed, seen), critical=False)
        chain = [made.sign(self.root_key, hashes.SHA256()), self.root]
        pems = [certificate.public_bytes(Encoding.PEM).decode() for certificate in chain]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": pems}}}

    def timestamp(self, certificate: bytes) -> bytes:
        """RFC 6962: that the certificate log has seen these bytes, as the list that an extension holds."""
        now = int(datetime.now(UTC).timestamp() * 1000)
        issuer = hashlib.sha256(public(self.root_key)).digest()
        signed = struct.pack("!BBQH", 0, 0, now, 1) + issuer + len(certificate).to_bytes(3, "big") + certificate
        signature = sign(self.ct_key, signed + b"\0\0")
        one = struct.pack("!B32sQHBBH", 0, key_id(self.ct_key), now, 0, 4, 3, len(signature)) + signature
        both = struct.pack("!HH", len(one) + 2, len(one)) + one
        return bytes([4, len(both)]) + both

    # -- the log --------------------------------------------------------------------------------------------------

    def enter(self, asked: Any) -> Any:
        """The entry of an envelope in a log that holds nothing else, with its proof and its timestamp."""
        proposed = asked["spec"]["proposedContent"]
        envelope, (verifier,) = json.loads(proposed["envelope"]), proposed["verifiers"]
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(proposed["envelope"].encode()).hexdigest()},
            "payloadHash": {
                "algorithm": "sha256",
                "value": hashlib.sha256(base64.b64decode(envelope["payload"])).hexdigest(),
            },
            "signatures": [{"signature": each["sig"], "verifier": verifier} for each in envelope["signatures"]],
        }
        body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"here - 1\n1\n{b64(root)}\n"
        checkpoint = f"{note}\n\u2014 here {b64(key_id(self.log_key)[:4] + sign(self.log_key, note.encode()))}\n"
        entry = {
            "body": b64(body),
            "integratedTime": int(datetime.now(UTC).timestamp()),
            "logID": key_id(self.log_key).hex(),
            "logIndex": 0,
        }
        promise = sign(self.log_key, json.dumps(entry, sort_keys=True, separators=(",", ":")).encode())
        proof = {"checkpoint": checkpoint, "hashes": [], "logIndex": 0, "rootHash": root.hex(), "treeSize": 1}
        return {"1" * 64: entry | {"verification": {"inclusionProof": proof, "signedEntryTimestamp": b64(promise)}}}

    def describe(self) -> Any:
        """What a client must know to trust these services and to find them."""
        from cryptography.hazmat.primitives.serialization import Encoding

        since = {"start": "2020-01-01T00:00:00Z"}

        def log(key: Any) -> Any:
            details = {"rawBytes": b64(public(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            return {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": details,
                "logId": {"keyId": b64(key_id(key))},
            }

        service = [{"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "here"}]
        authority = {
            "subject": {"organization": "here", "commonName": "sigstore here"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": b64(self.root.public_bytes(Encoding.DER))}]},
            "validFor": since,
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self.log_key)],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self.ct_key)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": service,
                "oidcUrls": service,
                "rekorTlogUrls": service,
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }


def public(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    data: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data


def key_id(key: Any) -> bytes:
    return hashlib.sha256(public(key)).digest()


def sign(key: Any, data: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    signature: bytes = key.sign(data, ec.ECDSA(hashes.SHA256()))
    return signature
