"""The cluster's certificate authority and the certificates of its nodes (X.509, ECDSA P-256).

A node's certificate names the node (`a.node.shoal`), not an address: addresses change. Whoever connects asks for the
node that it means. The operator's node also has `nats.shoal`, under which all look for NATS: no other node can pose
as the server. Addresses are named too, for clients that know nothing of this.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import NameOID

from shoal_common.errors import BadInput, Denied
from shoal_common.names import check_node

NATS_HOST = "nats.shoal"
_NODE_DOMAIN = "node.shoal"
_LIFETIME = datetime.timedelta(days=3650)
"""A node is turned away at once, by removing it from the members: expiry would only end a cluster left alone."""
_CLOCK_ERROR = datetime.timedelta(days=2)
"""A machine whose clock is behind by less than this accepts a new certificate."""
_MAX_PEM_CHARACTERS = 16 << 10


def node_host(node: str) -> str:
    """Return the host name of a node in its certificate."""
    return f"{check_node(node)}.{_NODE_DOMAIN}"


def new_key() -> EllipticCurvePrivateKey:
    """Return a new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM (PKCS #8). A secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes) -> EllipticCurvePrivateKey:
    """Return the private key in PEM text. Raises BadInput."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise BadInput("this is not a private key that Shoal has made")
    return key


def create_authority(cluster: str) -> tuple[EllipticCurvePrivateKey, bytes]:
    """Return the key and the certificate (PEM) of a new cluster's authority."""
    key = new_key()
    name = _name(f"Shoal cluster {cluster}")
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate.public_bytes(serialization.Encoding.PEM)


def signing_request(key: EllipticCurvePrivateKey, node: str) -> str:
    """Return a request (PEM) for a node's certificate, which proves that its sender has the key."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(check_node(node)))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def issue(
    authority: EllipticCurvePrivateKey, authority_pem: bytes, request_pem: str, node: str, hosts: Sequence[str]
) -> str:
    """Return a certificate (PEM) for a node, which is also known by `hosts`: names and addresses.

    Only the key is taken from the request. Raises BadInput if it is not the requester's.
    """
    key = _requested_key(request_pem)
    issuer = x509.load_pem_x509_certificate(authority_pem).subject
    names = [_general_name(host) for host in dict.fromkeys((node_host(node), *hosts))]
    certificate = (
        _builder(_name(node), issuer, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def public_key_of(certificate_pem: str, authority_pem: bytes, node: str) -> EllipticCurvePublicKey:
    """Return the public key of a node by its certificate. Raises Denied unless the authority issued it to it."""
    try:
        certificate = _load(certificate_pem)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority_pem))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise Denied(f"the certificate of node {node} is not from this cluster's authority") from None
    if node_host(node) not in names.get_values_for_type(x509.DNSName) or not isinstance(key, EllipticCurvePublicKey):
        raise Denied(f"this certificate is not that of node {node}")
    return key


def fingerprint(certificate_pem: bytes) -> bytes:
    """Return the SHA-256 of a certificate. Raises BadInput for what is none."""
    try:
        der = x509.load_pem_x509_certificate(certificate_pem).public_bytes(serialization.Encoding.DER)
    except ValueError:
        raise BadInput("this is not a certificate") from None
    return hashlib.sha256(der).digest()


def _load(pem: str) -> x509.Certificate:
    if len(pem) > _MAX_PEM_CHARACTERS:
        raise ValueError("too long")
    return x509.load_pem_x509_certificate(pem.encode())


def _requested_key(request_pem: str) -> EllipticCurvePublicKey:
    try:
        if len(request_pem) > _MAX_PEM_CHARACTERS:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(request_pem.encode())
        key = request.public_key()
        is_valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadInput("the request for a certificate cannot be read") from None
    if not is_valid or not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadInput("the request for a certificate is not signed by its key")
    return key


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_ERROR)
        .not_valid_after(now + _LIFETIME)
    )


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
