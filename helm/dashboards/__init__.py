"""The Grafana dashboards of the chart as code; `python -m helm.dashboards` renders them to helm/mull/dashboards."""
