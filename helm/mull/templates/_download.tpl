{{/* The pod that downloads the checkpoint. */}}
{{- define "mull.downloadPod" -}}
{{- $model := .Values.model -}}
{{- $download := $model.download -}}
{{- $target := printf "/models/%s" $model.path | trimSuffix "/" -}}
metadata:
  labels:
    {{- include "mull.labels" . | nindent 4 }}
    app.kubernetes.io/component: download
spec:
  restartPolicy: OnFailure
  {{- include "mull.podSecurity" . | nindent 2 }}
  {{- include "mull.scheduling" (list . dict) | nindent 2 }}
  containers:
    - name: download
      {{- if eq $model.source "s3" }}
      image: {{ $download.s3Image }}
      {{- else }}
      {{- include "mull.imageFields" . | nindent 6 }}
      {{- end }}
      # Beside its place, and moved there when it is whole: pods wait for the directory.
      command: [/bin/sh, -euc]
      args:
        - |
          if [ -d "$TARGET" ]; then echo "$TARGET is there"; exit 0; fi
          {{- if eq $model.source "s3" }}
          aws s3 sync --only-show-errors{{ with $download.endpointUrl }} --endpoint-url "$ENDPOINT"{{ end }} "s3://$REPOSITORY" "$TARGET.part"
          {{- else }}
          hf download "$REPOSITORY" --revision "$REVISION" --local-dir "$TARGET.part"
          {{- end }}
          mv "$TARGET.part" "$TARGET"
      env:
        - {name: HOME, value: /tmp}
        - {name: HF_HOME, value: /tmp/hf}
        - {name: TARGET, value: {{ $target | quote }}}
        - {name: REPOSITORY, value: {{ $download.repository | quote }}}
        - {name: REVISION, value: {{ $download.revision | quote }}}
        {{- with $download.endpointUrl }}
        - {name: ENDPOINT, value: {{ . | quote }}}
        {{- end }}
      {{- with $download.secretName }}
      envFrom: [{secretRef: {name: {{ . }}}}]
      {{- end }}
      resources:
        requests: {cpu: "1", memory: 4Gi}
        limits: {memory: 8Gi}
      securityContext: {{- include "mull.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: model, mountPath: /models}
  volumes:
    - {name: tmp, emptyDir: {}}
    {{- include "mull.modelVolume" . | nindent 4 }}
{{- end }}

{{/* Where the download goes: the port of the S3 endpoint, or HTTPS. */}}
{{- define "mull.downloadPort" -}}
{{- $endpoint := .Values.model.download.endpointUrl -}}
{{- if or (ne .Values.model.source "s3") (not $endpoint) -}}
443
{{- else -}}
{{- $url := urlParse $endpoint -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (eq $url.scheme "https" | ternary 443 80) -}}
{{- end -}}
{{- end }}
