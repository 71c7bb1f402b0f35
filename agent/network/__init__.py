"""The site on the network: the node process, peers, storage commitment, the disk watermark, pulls."""
