{{/* What Serve runs: no proxies, one application. */}}
{{- define "mull.serveConfig" -}}
proxy_location: Disabled
logging_config: {log_level: WARNING, encoding: JSON}
applications:
  - name: mull
    import_path: cluster.app:build
    route_prefix: null
    deployments:
      - {name: Gateway, num_replicas: {{ int .Values.gateway.replicas }}}
      - {name: Router, num_replicas: {{ int .Values.layout.copies }}}
    args: {{- include "mull.config" . | nindent 6 }}
{{- end }}

{{/* Seconds a gateway's pod may take to end: leave the Services, let streams end, close. */}}
{{- define "mull.graceS" -}}
{{- add 30 (ceil .Values.config.gateway.drain_s) -}}
{{- end }}
