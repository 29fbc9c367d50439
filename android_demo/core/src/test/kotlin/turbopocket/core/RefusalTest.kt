// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonObject
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.BeforeEach
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.ValueSource
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.MANIFEST_NAME
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.PictureSize
import turbopocket.core.drawing.Wish
import turbopocket.core.drawing.megabytes
import turbopocket.core.onnx.OnnxRuntime
import turbopocket.core.text.ClipTokenizer
import java.io.File
import java.io.RandomAccessFile
import java.nio.file.Files

/** What is not opened, and what is not drawn. */
class RefusalTest {
    @TempDir lateinit var folder: File
    private lateinit var scratch: Scratch

    @BeforeEach
    fun copy() {
        scratch = Scratch(folder)
    }

    private fun open() = Artifact.open(folder)

    private fun draw(wish: Wish = Wish("a red circle", 0)) = Drawer(open(), OnnxRuntime()).draw(wish)

    @Test
    fun `an untouched copy draws`() {
        assertEquals(PictureSize(32, 32), draw().let { PictureSize(it.height, it.width) })
    }

    @ParameterizedTest
    @ValueSource(
        strings = ["unet/model.onnx.data", "unet/model.onnx", "vae_decoder/model.onnx", "tokenizer/tokenizer.json"],
    )
    fun `a flipped bit is found before the file is opened`(path: String) {
        RandomAccessFile(File(folder, path), "rw").use {
            it.seek(it.length() / 2)
            val byte = it.read()
            it.seek(it.length() / 2)
            it.write(byte xor 1)
        }
        assertRefused("$path is damaged: its SHA-256 is") { draw() }
    }

    @Test
    fun `a missing file is named when the artifact is opened`() {
        File(folder, "vae_decoder/model.onnx").delete()
        assertRefused("vae_decoder/model.onnx is missing") { open() }
    }

    @Test
    fun `a file that was cut off is named when the artifact is opened`() {
        RandomAccessFile(File(folder, "unet/model.onnx.data"), "rw").use { it.setLength(it.length() - 1) }
        assertRefused("unet/model.onnx.data has") { open() }
    }

    @ParameterizedTest
    @ValueSource(strings = ["../unet/model.onnx", "/etc/passwd", "a/../../b", "a\\b", "c:/a", "a//b", "./a", ""])
    fun `a path that leaves the folder is not followed`(path: String) {
        scratch.setFile("unet/model.onnx.data", "path" to JsonPrimitive(path))
        assertRefused("is not a plain relative path inside the artifact") { open() }
    }

    @Test
    fun `a link is not followed`() {
        val weights = File(folder, "unet/model.onnx.data")
        val elsewhere = File.createTempFile("weights", null)
        weights.copyTo(elsewhere, overwrite = true)
        weights.delete()
        Files.createSymbolicLink(weights.toPath(), elsewhere.toPath())
        assertRefused("is a link") { open() }
    }

    @ParameterizedTest
    @ValueSource(strings = ["3", "1", "\"2\"", "null", "2.5"])
    fun `another schema is not read`(version: String) {
        val found = kotlinx.serialization.json.Json.parseToJsonElement(version)
        scratch.set("schema_version", found)
        assertRefused("schema_version $version; this app reads 2") { open() }
    }

    @Test
    fun `an artifact that was never compared is not opened`() {
        scratch.set("parity", JsonNull)
        assertRefused("was never compared with PyTorch") { open() }
        scratch.set("parity", null)
        assertRefused("was never compared with PyTorch") { open() }
    }

    @Test
    fun `an artifact whose comparison failed is not opened`() {
        val parity = scratch.json().getValue("parity").jsonObject
        val lowering = JsonObject(mapOf("onnxruntime" to JsonObject(mapOf("unet" to JsonPrimitive(0.25)))))
        scratch.set("parity", JsonObject(parity + mapOf("passed" to JsonPrimitive(false), "lowering" to lowering)))
        assertRefused("failed its comparison with PyTorch: unet differs by 0.25 in onnxruntime") { open() }
        scratch.set("parity", JsonObject(parity - "passed"))
        assertRefused("failed its comparison with PyTorch") { open() }
    }

    @Test
    fun `a field that nobody knows is named`() {
        scratch.set("surprise", JsonPrimitive(1))
        assertRefused("surprise") { open() }
    }

    @Test
    fun `a manifest that is cut off is refused`() {
        File(folder, MANIFEST_NAME).let { it.writeText(it.readText().dropLast(300)) }
        assertRefused(MANIFEST_NAME) { open() }
        File(folder, MANIFEST_NAME).writeText("[".repeat(100_000))
        assertRefused(MANIFEST_NAME) { open() }
        File(folder, MANIFEST_NAME).delete()
        assertRefused("is not an artifact") { open() }
    }

    @Test
    fun `a pipeline that names what is not there is refused`() {
        val pipeline = scratch.json().getValue("pipeline").jsonObject
        val decoder = pipeline.getValue("decoder").jsonObject
        val changed = JsonObject(decoder + ("output" to JsonPrimitive("x")))
        scratch.set("pipeline", JsonObject(pipeline + ("decoder" to changed)))
        assertRefused("the pipeline names output x of vae_decoder, which has sample") { open() }
    }

    @Test
    fun `an artifact of another runtime is not drawn`() {
        scratch.set("target", JsonPrimitive("executorch"))
        assertRefused("was built for executorch; onnx artifacts are opened here") { draw() }
    }

    @Test
    fun `an artifact without a sampler table is not drawn`() {
        scratch.set("sampler_table", JsonNull)
        assertRefused("was built before manifests had a sampler table") { draw() }
    }

    @Test
    fun `a component that does not fit in memory is not opened`() {
        val artifact = open()
        val unet = artifact.componentBytes("unet")
        assertEquals(File(folder, "unet").walk().filter { it.isFile }.sumOf { it.length() }, unet)
        val opened = ArrayList<Long>()
        val runtime = OnnxRuntime { (unet - 1).also(opened::add) }
        assertRefused("unet needs ${megabytes(unet)} of memory for its weights alone") {
            Drawer(artifact, runtime).draw(Wish("a red circle", 0))
        }
        assertEquals(3, opened.size, "both text encoders fit")
        Drawer(artifact, OnnxRuntime { unet }).draw(Wish("a red circle", 0))
    }

    @Test
    fun `wishes that the artifact does not fulfil are refused`() {
        assertRefused("the prompt is empty") { draw(Wish("  ", 0)) }
        assertRefused("seed -1 is below 0") { draw(Wish("a", -1)) }
        assertRefused("64x64 was asked") { draw(Wish("a", 0, size = PictureSize(64, 64))) }
        val unheard = Wish("a", 0, negativePrompt = "b", guidance = 1f)
        assertRefused("a negative prompt has no effect here") { draw(unheard) }
    }

    @Test
    fun `files that are none are refused in a sentence`() {
        val wrong = "not a graph".toByteArray()
        File(folder, "vae_decoder/model.onnx").writeBytes(wrong)
        val hash = turbopocket.core.artifact.sha256(File(folder, "vae_decoder/model.onnx"))
        scratch.setFile("vae_decoder/model.onnx", "bytes" to JsonPrimitive(wrong.size), "sha256" to JsonPrimitive(hash))
        assertRefused("vae_decoder: ONNX Runtime") { draw() }
    }

    @Test
    fun `graphs that are not as the manifest says are refused`() {
        val components = scratch.json().getValue("components").jsonObject
        val decoder = components.getValue("vae_decoder").jsonObject
        val text = decoder.toString().replace("\"batch\",3,32,32", "\"batch\",3,64,64")
        val changed = kotlinx.serialization.json.Json.parseToJsonElement(text)
        scratch.set("components", JsonObject(components + ("vae_decoder" to changed)))
        assertRefused("vae_decoder: output sample is") { draw() }
    }

    @Test
    fun `a tokenizer of another kind is refused`() {
        val file = File(folder, "tokenizer/tokenizer.json")
        val text = file.readText()
        val kind = "\"BPE\"" to "\"Unigram\""
        for ((from, to) in listOf(kind, "'s|'t" to "'t|'s", "RobertaProcessing" to "BertProcessing")) {
            assertTrue(from in text)
            file.writeText(text.replaceFirst(from, to))
            assertRefused("is '") { ClipTokenizer(file, 77) }
        }
        file.writeText("{")
        assertRefused("is not JSON") { ClipTokenizer(file, 77) }
        file.writeText("{}")
        assertRefused("is not as in a CLIP tokenizer") { ClipTokenizer(file, 77) }
    }
}
