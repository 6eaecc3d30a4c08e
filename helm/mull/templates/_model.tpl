{{/* Where the checkpoint comes from. */}}

{{- define "mull.isDownloaded" -}}
{{- if has .Values.model.source (list "huggingface" "s3") }}true{{ end -}}
{{- end }}

{{- define "mull.modelPath" -}}
{{- include "mull.checkModel" . -}}
{{- printf "/models/%s" .Values.model.path | trimSuffix "/" -}}
{{- end }}

{{- define "mull.checkModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "pvc") (not $model.claimName) -}}
{{- fail "model.source is pvc: give model.claimName, and model.path where the checkpoint is not at the volume's root" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath) -}}
{{- fail "model.source is hostPath: give model.hostPath, a directory of every node" -}}
{{- end -}}
{{- if include "mull.isDownloaded" . -}}
{{- if not $model.path -}}
{{- fail (printf "model.source is %s: give model.path, the directory that the checkpoint gets in the volume" $model.source) -}}
{{- end -}}
{{- if not $model.download.repository -}}
{{- fail (printf "model.source is %s: give model.download.repository" $model.source) -}}
{{- end -}}
{{- with $model.download.endpointUrl -}}
{{- if not (regexMatch "^https?://[^/:[:space:]]+(:[0-9]+)?(/.*)?$" .) -}}
{{- fail (printf "model.download.endpointUrl %s: give it as http://HOST:PORT or https://HOST:PORT" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if or (hasPrefix "/" $model.path) (contains ".." $model.path) -}}
{{- fail (printf "model.path %s: give a directory inside the volume, without a leading / and without .." $model.path) -}}
{{- end -}}
{{- end }}

{{- define "mull.modelClaim" -}}
{{- .Values.model.claimName | default (printf "%s-model" (include "mull.fullname" .)) -}}
{{- end }}

{{- define "mull.modelVolume" -}}
{{- include "mull.checkModel" . -}}
{{- if eq .Values.model.source "hostPath" }}
- name: model
  hostPath: {path: {{ .Values.model.hostPath | quote }}, type: Directory}
{{- else if ne .Values.model.source "builtin" }}
- name: model
  persistentVolumeClaim: {claimName: {{ include "mull.modelClaim" . }}}
{{- end }}
{{- end }}

{{- define "mull.modelMount" -}}
{{- if ne .Values.model.source "builtin" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}
