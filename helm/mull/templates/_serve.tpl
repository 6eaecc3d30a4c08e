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
      - {{- include "mull.copies" . | nindent 8 }}
    args: {{- include "mull.config" . | nindent 6 }}
{{- end }}

{{/* Seconds a gateway's pod may take to end: leave the Services, let streams end, close. */}}
{{- define "mull.graceS" -}}
{{- add 30 (ceil .Values.config.gateway.drain_s) -}}
{{- end }}

{{/* How many copies there are: said here rather than in `args`, so that a change of it leaves those that run alone. */}}
{{- define "mull.copies" -}}
{{- $layout := .Values.layout -}}
name: Router
{{- if kindIs "invalid" $layout.maxCopies }}
num_replicas: {{ int $layout.copies }}
{{- else }}
num_replicas: auto
autoscaling_config:
  min_replicas: {{ int $layout.copies }}
  initial_replicas: {{ int $layout.copies }}
  max_replicas: {{ int $layout.maxCopies }}
  upscale_delay_s: {{ int $layout.upscaleDelayS }}
  downscale_delay_s: {{ int $layout.downscaleDelayS }}
  policy: {policy_function: "cluster.router.autoscaling:scale_copies"}
{{- end }}
{{- end }}
