{{/* mull.config: the ClusterConfig of this installation, as YAML: what Serve passes to cluster.app:build.
     How many copies and gateways there are is said beside it (mull.serveConfig): a change here replaces them all. */}}
{{- define "mull.config" -}}
{{- include "mull.checkConfig" . -}}
{{- $layout := .Values.layout -}}
{{- $engine := dict
      "tp" (int $layout.tp) "dp" (int $layout.dp) "expert_tp" (int $layout.expertTp)
      "redundant_experts" (int $layout.redundantExperts) "device" $layout.device
      "threads_per_rank" (int $layout.cpusPerRank) -}}
{{- $ports := .Values.gateway.ports -}}
{{- $gateway := dict
      "host" "0.0.0.0" "metrics_host" "0.0.0.0" "node_resource" "mull-gateway"
      "grpc_port" (int $ports.grpc) "http_port" (int $ports.http) "metrics_port" (int $ports.metrics) -}}
{{- $config := dict
      "model" (include "mull.modelConfig" . | fromYaml)
      "engine" (merge $engine .Values.config.engine)
      "router" (merge (dict "metrics_port" (int .Values.ranks.ports.metrics)) .Values.config.router)
      "gateway" (merge $gateway .Values.config.gateway)
      "security" (include "mull.securityConfig" . | fromYaml)
      "logs" .Values.config.logs
      "tracing" .Values.config.tracing -}}
{{- toYaml $config -}}
{{- end }}

{{/* What mull itself would refuse, but only in a pod. */}}
{{- define "mull.checkConfig" -}}
{{- $ranksPort := int .Values.ranks.ports.metrics -}}
{{- $names := dict -}}
{{- range $name, $port := .Values.gateway.ports -}}
{{- if eq (int $port) $ranksPort -}}
{{- fail (printf "ranks.ports.metrics and gateway.ports.%s are both %d; choose another port for one of them" $name $ranksPort) -}}
{{- end -}}
{{- with get $names (int $port | toString) -}}
{{- fail (printf "gateway.ports.%s and gateway.ports.%s are both %d; choose another port for one of them" . $name (int $port)) -}}
{{- end -}}
{{- $_ := set $names (int $port | toString) $name -}}
{{- end -}}
{{- /* 512 and 64 are the defaults of mull's own configuration. */ -}}
{{- $tokens := .Values.config.engine.max_num_batched_tokens | default 512 | int -}}
{{- $sequences := .Values.config.engine.max_num_seqs | default 64 | int -}}
{{- if lt $tokens $sequences -}}
{{- fail (printf "config.engine.max_num_batched_tokens %d is below max_num_seqs %d; raise the one or lower the other" $tokens $sequences) -}}
{{- end -}}
{{- with .Values.config.tracing.otlp_endpoint -}}
{{- if not (regexMatch "^https?://[^/@[:space:]]+:[0-9]+$" .) -}}
{{- fail (printf "config.tracing.otlp_endpoint %s: give it as http://HOST:PORT or https://HOST:PORT; collectors mostly listen on 4317" .) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "mull.modelConfig" -}}
name: {{ .Values.model.name | quote }}
{{- if ne .Values.model.source "builtin" }}
path: {{ include "mull.modelPath" . | quote }}
{{- end }}
{{- end }}

{{- define "mull.securityConfig" -}}
{{- include "mull.checkSecurity" . -}}
{{- $security := .Values.security -}}
insecure: {{ $security.insecure }}
{{- if ne $security.tls.mode "none" }}
tls_cert: /etc/mull/tls/tls.crt
tls_key: /etc/mull/tls/tls.key
link_cert: /etc/mull/link/tls.crt
link_key: /etc/mull/link/tls.key
link_ca: /etc/mull/link/ca.crt
{{- end }}
{{- if $security.tls.clientCaSecretName }}
tls_client_ca: /etc/mull/client-ca/ca.crt
{{- end }}
{{- if $security.keys.secretName }}
keys_file: /etc/mull/keys/{{ $security.keys.secretKey }}
{{- end }}
{{- end }}

{{- define "mull.checkSecurity" -}}
{{- $security := .Values.security -}}
{{- $tls := $security.tls -}}
{{- if and (eq $tls.mode "none") (not $security.insecure) -}}
{{- fail "security.tls.mode is none: prompts would cross the network in plain text; set it to certManager or existing, or security.insecure=true inside a private cluster" -}}
{{- end -}}
{{- if and (hasPrefix "http://" (.Values.config.tracing.otlp_endpoint | default "")) (not $security.insecure) -}}
{{- fail "config.tracing.otlp_endpoint is http://: spans would cross the network in plain text; give an https:// one, or security.insecure=true inside a private cluster" -}}
{{- end -}}
{{- if and (eq $tls.mode "none") $tls.clientCaSecretName -}}
{{- fail "security.tls.clientCaSecretName needs security.tls.mode certManager or existing: certificates are shown over TLS only" -}}
{{- end -}}
{{- if eq $tls.mode "existing" -}}
{{- if not (and $tls.secretName $tls.linkSecretName) -}}
{{- fail "security.tls.mode is existing: give security.tls.secretName (tls.crt, tls.key) and security.tls.linkSecretName (tls.crt, tls.key, ca.crt)" -}}
{{- end -}}
{{- end -}}
{{- if eq $tls.mode "existing" -}}
{{- include "mull.checkSecret" (list . $tls.secretName "tls.crt" "tls.key") -}}
{{- include "mull.checkSecret" (list . $tls.linkSecretName "tls.crt" "tls.key" "ca.crt") -}}
{{- end -}}
{{- with $tls.clientCaSecretName }}{{ include "mull.checkSecret" (list $ . "ca.crt") }}{{ end -}}
{{- with $security.keys.secretName }}{{ include "mull.checkSecret" (list $ . $security.keys.secretKey) }}{{ end -}}
{{- end }}

{{/* A Secret that exists must hold these keys. One that is not there yet, or cannot be seen, is left to the kubelet. */}}
{{- define "mull.checkSecret" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $data := (lookup "v1" "Secret" $root.Release.Namespace $name).data -}}
{{- if $data -}}
{{- range $key := slice . 2 -}}
{{- if not (hasKey $data $key) -}}
{{- fail (printf "Secret %s has no key %s; it has %s" $name $key (keys $data | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
