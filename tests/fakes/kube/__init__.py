"""A pretended Kubernetes with a pretended KubeRay; README.md says what they pretend. Start at `cluster.KubeCluster`."""
