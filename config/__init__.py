"""What a deployment says about itself: its configuration and the manifests of its exported models."""
