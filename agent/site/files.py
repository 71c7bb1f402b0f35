"""Sealed bundles of a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.site.site import Site

if TYPE_CHECKING:
    from deploy.bundle.bundle import Bundle


def open_sealed(site: Site, bundle: str) -> Bundle:
    """Return a sealed bundle after its hashes and its signature were verified; raises BundleRefused."""
    from deploy.bundle.bundle import open_bundle

    return open_bundle(site.models, bundle, site.key("signing.pub"))
