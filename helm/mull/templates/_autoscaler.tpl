{{/* Ray's autoscaler, with layout.maxCopies: a container that KubeRay puts beside the head, and the one that may ask
     Kubernetes for pods. KubeRay gives the rights to the head's account; the token is mounted in that container alone. */}}
{{- define "mull.isScaled" -}}
{{- if not (kindIs "invalid" .Values.layout.maxCopies) }}true{{ end -}}
{{- end }}

{{- define "mull.headAccount" -}}
{{- if include "mull.isScaled" . }}{{ include "mull.fullname" . }}-head{{ else }}{{ include "mull.serviceAccount" . }}{{ end -}}
{{- end }}

{{- define "mull.autoscaler" -}}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  # A pod without a copy goes after this, but for those of layout.copies.
  idleTimeoutSeconds: 120
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  env: {{- include "mull.rayEnv" . | nindent 4 }}
  resources: {{- toYaml .Values.head.autoscalerResources | nindent 4 }}
  securityContext: {{- include "mull.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: kubernetes-api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}

{{- define "mull.autoscalerVolume" -}}
- name: kubernetes-api
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
