"""The Grafana dashboards as code; `python -m helm.dashboards` renders them to helm/mull/dashboards.

Beside the chart and not in it: a chart is packed with all that is in its folder.
"""
