{{/* Names, labels and the image. */}}

{{/* At most 40 characters: KubeRay adds up to 22 to it for its own objects. */}}
{{- define "mull.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- .Values.fullnameOverride | default $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "mull.selector" -}}
app.kubernetes.io/name: mull
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mull.labels" -}}
{{ include "mull.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Pods by what they do; KubeRay sets ray.io/group itself. */}}
{{- define "mull.gatewaySelector" -}}
{{ include "mull.selector" . }}
ray.io/group: gateway
{{- end }}

{{- define "mull.image" -}}
{{- $tag := .Values.image.tag -}}
{{- if not $tag }}{{ $tag = eq .Values.layout.device "cuda" | ternary (printf "%s-cuda" .Chart.AppVersion) .Chart.AppVersion }}{{ end -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end }}

{{- define "mull.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "mull.fullname" .) -}}
{{- end }}
