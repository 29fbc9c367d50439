// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json
import turbopocket.core.artifact.SamplerTable
import java.io.File

/** What Python computed in this test run, in the folder that the property `golden` names. */
object Golden {
    val folder: File = File(
        System.getProperty("golden") ?: error("these tests compare with Python: run `make test-android`"),
    )
    val all: All = Json.decodeFromString(File(folder, "golden.json").readText())
    val walks: List<WalkCase> = Json.decodeFromString(File(folder, "walks.json").readText())

    @Serializable
    class All(
        val artifact: String,
        val tokenizers: List<TokenizerCases>,
        val noise: List<NoiseCase>,
        val pictures: List<PictureCase>,
    )

    @Serializable
    class TokenizerCases(val name: String, val file: String, val length: Int, val cases: List<PromptCase>)

    @Serializable
    class PromptCase(val prompt: String, val ids: List<Int>, val mask: List<Int>, val cut: String?)

    @Serializable
    class NoiseCase(val seed: Long, val count: Int, val sha256: String, val tail: Int)

    @Serializable
    class PictureCase(val prompt: String, val seed: Long, val file: String)

    @Serializable
    class WalkCase(val kind: String, val table: SamplerTable, val steps: List<StepCase>)

    @Serializable
    class StepCase(
        val x: List<Float>,
        val seen: List<Float>,
        val output: List<Float>,
        val noise: List<Float>,
        val next: List<Float>,
    )
}
