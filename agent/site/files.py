"""Sealed bundles of a site."""

from agent.site.site import Site
from deploy.bundle.bundle import Bundle, open_bundle


def open_sealed(site: Site, bundle: str) -> Bundle:
    """Return a sealed bundle after its hashes and its signature were verified; raises BundleRefused."""
    return open_bundle(site.models, bundle, site.key("signing.pub"))
